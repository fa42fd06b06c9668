"""The demo that ships with moec: a small MoE trained on real digits, compiled and measured on this machine."""
