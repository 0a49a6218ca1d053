"""Files of requests, answered by the handlers of the server in this process, without sockets: `zif batch`."""
