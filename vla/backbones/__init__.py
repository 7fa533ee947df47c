"""Vision-language models that return the hidden states of every layer. May import `vla.core`, `vla.runtime` and
`vla.processing`."""
