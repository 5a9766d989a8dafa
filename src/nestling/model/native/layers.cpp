// What the library gives away in float alone: products of some rows, and whole layers.

#include "layer.h"

extern "C" {
void few_float(const Product* s) { few(*s); }
void many_float(const Product* s) { many(*s); }
void tiled_float(const Product* s) { tiled(*s); }
int64_t tiles_granted_float() { return tiles_granted(); }
void mlp_float(const Mlp* s) { mlp(*s); }
void mamba_float(const Mamba* s) { mamba(*s); }
}
