"""`elasticmoe bench`: each benchmark is one command that prints a table and writes raw JSON and a plot."""
