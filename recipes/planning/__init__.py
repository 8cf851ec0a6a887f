"""The settings of a recipe -> its plan, and a plan -> a page."""
