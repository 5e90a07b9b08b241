TRACKER = "tracker "  # beginning of the names of threads that may wait for a server that does not answer
