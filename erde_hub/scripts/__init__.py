"""What a person runs: one readable file per command, and what they share."""
