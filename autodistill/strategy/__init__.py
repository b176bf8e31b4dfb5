"""The objects of a search: strategies, deployments, and the spaces that contain them."""
