"""Files of settings and of facts, read strictly and written whole: TOML tables, JSON. Imports nothing heavy."""
