"""Exchange of tokens between ranks: to the experts' owners and back."""
