"""What a trained model is worth: perplexity by domain, simple baselines beside it, and text it writes."""
