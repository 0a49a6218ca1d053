"""Anthropic's Messages API: requests into chats, answers into messages and their events."""
