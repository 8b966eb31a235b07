"""fastdpo: Direct Preference Optimization without ever writing the logits. `import fastdpo.loss` is
the way in.
"""

__version__ = "0.1.0"
