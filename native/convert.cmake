# native.convert: as native.kernels one source, compiled once for each instruction set; included after kernels.cmake.

set(ELASTICMOE_CONVERT_OBJECTS)
set(ELASTICMOE_CONVERT_SETS ${ELASTICMOE_KERNEL_SETS})
list(REMOVE_ITEM ELASTICMOE_CONVERT_SETS amx)  # nothing here multiplies matrices
foreach(set IN LISTS ELASTICMOE_CONVERT_SETS)
  add_library(convert_${set} OBJECT ${CMAKE_CURRENT_LIST_DIR}/src/convert/isa.cpp)
  target_include_directories(convert_${set} PRIVATE ${CMAKE_CURRENT_LIST_DIR}/src)
  target_compile_definitions(convert_${set} PRIVATE ELASTICMOE_ISA=${set})
  # Nothing may change what the source says: results are compared bit by bit.
  target_compile_options(convert_${set} PRIVATE ${ELASTICMOE_KERNEL_FLAGS_${set}} -O3 -ffp-contract=off -Wno-psabi)
  list(APPEND ELASTICMOE_CONVERT_OBJECTS $<TARGET_OBJECTS:convert_${set}>)
endforeach()

elasticmoe_module(convert ${CMAKE_CURRENT_LIST_DIR}/src/convert/bindings.cpp ${ELASTICMOE_CONVERT_OBJECTS})
