"""Commands of ``pytest-gpumem``, a module for each kind of file that they work on."""
