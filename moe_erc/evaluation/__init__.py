"""Evaluation of a trained model: perplexity and baselines, benchmark tasks, and samples of text."""
