"""Evaluation of a trained model: perplexity beside simple baselines, benchmark tasks, and samples."""
