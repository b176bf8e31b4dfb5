"""What is searched: strategies, deployments, and the spaces that hold them."""
