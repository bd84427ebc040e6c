"""`elasticmoe tour`: a deployment comes up, grows, loses a rank and shrinks under load, told with the figures."""
