"""`zif serve`: HTTP in one process, the engine in another, a typed message protocol between them."""
