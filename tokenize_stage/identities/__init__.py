"""One module for each kind of tokenizer, with `describe(config) -> Identity`. None imports torch at its top."""
