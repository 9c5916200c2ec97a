"""Text in, tokens out: tokenizers (`tokenizer`) and the harmony format (`harmony`). Imports nothing heavy."""
