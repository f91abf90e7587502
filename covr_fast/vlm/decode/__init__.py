"""How an answer is made: the fast decoder, and the reference that it must equal."""
