"""What runs look like to a reader: progress on the terminal, tables, curves."""
