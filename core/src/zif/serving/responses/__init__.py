"""OpenAI's Responses API, stateless as in Open Responses: requests into chats, answers into items and events."""
