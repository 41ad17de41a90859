"""What starts a program: its command line, its config file, its processes, its caches."""
