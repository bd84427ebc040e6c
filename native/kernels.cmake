# The kernels of native.kernels: one source, compiled once for each instruction set; dispatch.cpp picks at run time.

set(ELASTICMOE_KERNEL_SETS baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND ELASTICMOE_KERNEL_SETS avx2 avx512 avx512bf16 amx)
endif()
set(ELASTICMOE_KERNEL_FLAGS_baseline)
set(ELASTICMOE_KERNEL_FLAGS_avx2 -mavx2 -mfma)
set(ELASTICMOE_KERNEL_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mprefer-vector-width=512)

set(ELASTICMOE_KERNEL_FLAGS_avx512bf16 ${ELASTICMOE_KERNEL_FLAGS_avx512} -mavx512bf16)
set(ELASTICMOE_KERNEL_FLAGS_amx ${ELASTICMOE_KERNEL_FLAGS_avx512} -mamx-tile -mamx-bf16)

# On x86 processors of 2015 to 2019 a short loop whose jump crosses 32 bytes loses a fifth of its speed (Intel's JCC
# erratum); the assembler can move it.
include(CheckCXXCompilerFlag)
set(ELASTICMOE_JUMPS_FLAG "-Wa,-mbranches-within-32B-boundaries")
check_cxx_compiler_flag(${ELASTICMOE_JUMPS_FLAG} ELASTICMOE_HAS_JUMPS_FLAG)
if(ELASTICMOE_HAS_JUMPS_FLAG)
  list(APPEND ELASTICMOE_KERNEL_FLAGS_avx2 ${ELASTICMOE_JUMPS_FLAG})
  list(APPEND ELASTICMOE_KERNEL_FLAGS_avx512 ${ELASTICMOE_JUMPS_FLAG})
  list(APPEND ELASTICMOE_KERNEL_FLAGS_avx512bf16 ${ELASTICMOE_JUMPS_FLAG})
  list(APPEND ELASTICMOE_KERNEL_FLAGS_amx ${ELASTICMOE_JUMPS_FLAG})
endif()

# AddressSanitizer's frames that outlive a return are not aligned as GCC believes that locals of 64 bytes are.
set(ELASTICMOE_KERNEL_SANITIZING)
if(ELASTICMOE_SANITIZE MATCHES "address" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(ELASTICMOE_KERNEL_SANITIZING --param=asan-use-after-return=0)
endif()

set(ELASTICMOE_KERNEL_OBJECTS)
foreach(set IN LISTS ELASTICMOE_KERNEL_SETS)
  add_library(kernels_${set} OBJECT ${CMAKE_CURRENT_LIST_DIR}/src/kernels/isa.cpp)
  target_include_directories(kernels_${set} PRIVATE ${CMAKE_CURRENT_LIST_DIR}/src)
  target_compile_definitions(kernels_${set} PRIVATE ELASTICMOE_ISA=${set})
  # Sums of products are fused; nothing else may change what the source says (NaN and order of additions matter). -O3 also
  # where the build type asks for less. -Wno-psabi: vectors are passed between inlined functions only.
  target_compile_options(kernels_${set} PRIVATE ${ELASTICMOE_KERNEL_FLAGS_${set}} -O3 -ffp-contract=fast
    -fno-math-errno -fno-trapping-math -Wno-psabi ${ELASTICMOE_KERNEL_SANITIZING})
  list(APPEND ELASTICMOE_KERNEL_OBJECTS $<TARGET_OBJECTS:kernels_${set}>)
endforeach()

# Everything but the bindings, as elasticmoe_native is: tests, sanitizers and benchmarks link it.
add_library(elasticmoe_kernels STATIC
  ${CMAKE_CURRENT_LIST_DIR}/src/kernels/crew.cpp
  ${CMAKE_CURRENT_LIST_DIR}/src/kernels/dispatch.cpp
  ${CMAKE_CURRENT_LIST_DIR}/src/kernels/oracle.cpp
  ${CMAKE_CURRENT_LIST_DIR}/src/kernels/sampling.cpp
  ${CMAKE_CURRENT_LIST_DIR}/src/kernels/shared.cpp
  ${ELASTICMOE_KERNEL_OBJECTS})
target_include_directories(elasticmoe_kernels PUBLIC ${CMAKE_CURRENT_LIST_DIR}/src)
target_link_libraries(elasticmoe_kernels PUBLIC Threads::Threads)
target_compile_options(elasticmoe_kernels PRIVATE ${ELASTICMOE_WARNINGS})
