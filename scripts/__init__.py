"""What makes files of this repository from the code or from a running deployment. Not part of the product."""
