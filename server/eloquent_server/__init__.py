"""The server: takes turns over Eloquent and answers them with a backend."""
