"""The server core: routes with auth scopes, bodies with limits, errors, streams, health. No API is defined here."""
