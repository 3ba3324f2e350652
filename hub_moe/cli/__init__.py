"""The command line: one thin file per command, torch and transformers imported only inside of them."""
