"""Looking at what a run made: one self-contained page for a token set or a training run, and one image at a time."""
