"""Models behind a service: Gemini and endpoints of Vertex AI."""
