"""The paper's study."""
