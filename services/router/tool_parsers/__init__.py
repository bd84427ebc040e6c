"""From the text of an answer to the calls that it asks for: one parser for each form in which models write calls."""
