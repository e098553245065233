"""A page for each method: its flags, their ranges and checks, and what the rest of the house has to know of it. No torch."""
