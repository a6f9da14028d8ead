// Every kernel, as the one module that the program loads.
#include "rows.cu"
#include "cache.cu"
#include "prefill.cu"
#include "products.cu"
#include "choose.cu"
