"""T5: questions in words, and the answers that the model writes."""
