"""ThreadWeaver: train and run language models that think in parallel threads."""
