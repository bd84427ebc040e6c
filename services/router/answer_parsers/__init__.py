"""What an answer's text is made of: what the model thought, what it says, and the calls that it asks for."""
