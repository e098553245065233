"""On-policy distillation by reverse KL in one table: megakd in several layouts beside what people use today."""
