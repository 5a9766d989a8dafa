// What the library gives away in float alone: products of some rows, and whole layers.

#include "layer.h"

extern "C" {
void few_float(const Product* s) { few(*s); }
void many_float(const Product* s) { many(*s); }
void mlp_float(const Mlp* s) { mlp(*s); }
void mamba_float(const Mamba* s) { mamba(*s); }
}
