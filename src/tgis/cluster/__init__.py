"""Many replicas on a Ray cluster, behind Ray Serve's proxies."""
