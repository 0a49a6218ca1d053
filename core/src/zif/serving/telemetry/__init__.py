"""What operators see of a server: metrics, one log line a request, traces, and events of the KV cache."""
