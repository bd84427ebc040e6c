// The kernels of one instruction set. Compiled once for each, with ELASTICMOE_ISA naming it (kernels.cmake).
#include "kernels/attention.h"
#include "kernels/latent.h"
#include "kernels/layers.h"
#include "kernels/router.h"
#include "kernels/store.h"

namespace elasticmoe::kernels {

#define ELASTICMOE_TEXT_OF(name) #name
#define ELASTICMOE_TEXT(name) ELASTICMOE_TEXT_OF(name)

namespace ELASTICMOE_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    ELASTICMOE_TEXT(ELASTICMOE_ISA),
    linear,
    norm,
    store_kv,
    attention,
    store_latent,
    latent_attention,
    router,
    experts,
    activate,
    embed,
    exponentials,
    greatest,
};

}  // namespace ELASTICMOE_ISA
}  // namespace elasticmoe::kernels
