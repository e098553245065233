"""What a student learns from labels and from a teacher's distribution, both from one reading of its logits."""
