"""Chat models behind OpenAI-compatible endpoints: one client for judges and partners (extra ``[llm]``)."""
