"""The engine: how a student is built, trained by its teacher and put on a quantisation grid."""
