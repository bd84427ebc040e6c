"""What the services share: messages, sockets, the store, configuration, model geometry, layouts, device backends."""
