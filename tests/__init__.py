"""The suite, by package and wing; `tests.helpers` is what its files share."""
