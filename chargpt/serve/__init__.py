"""An HTTP server for runs: OpenAI's completion API, decoded in one batch per model."""
