"""The inspector in a browser: pages made on the server, over the same queries as the terminal."""
