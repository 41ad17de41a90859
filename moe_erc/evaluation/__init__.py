"""What a trained model is worth: perplexity beside simple baselines, benchmark tasks, and the text it writes."""
