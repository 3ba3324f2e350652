"""`python -m hub_moe` is the `hub-moe` command."""

from hub_moe.cli.main import main

if __name__ == "__main__":
    main()
